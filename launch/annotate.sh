#!/usr/bin/env bash
# Annotates shards on a cluster through Apache Beam: the words of `kaleido annotate`, run elsewhere.
#
#   launch/annotate.sh dataflow|flink|spark WORDS OF kaleido annotate [-- MORE BEAM FLAGS]
#   PROJECT=my-project REGION=us-central1 BUCKET=gs://my-bucket IMAGE=REGISTRY/kaleido:1 \
#     launch/annotate.sh dataflow --data 'gs://my-bucket/cc12m/{00000..01242}.tar' \
#     --out gs://my-bucket/latents --engine.text hf:Qwen/Qwen2.5-VL-3B-Instruct
#   FLINK=head:8081 WORKERS=8 launch/annotate.sh flink --data /shared/cc12m --out /shared/latents ...
#   JOBS=head:8099 launch/annotate.sh spark --data /shared/cc12m --out /shared/latents ...
#
# dataflow  needs PROJECT, REGION, BUCKET (for temporary files) and IMAGE, a container with
#           kaleido_jax[annotate] and apache-beam[gcp]. WORKERS (at most, default 16), MACHINE
#           (default g2-standard-8), ACCELERATOR (default one nvidia-l4; empty for CPUs only).
# flink     needs FLINK, the job manager, and beside each task manager a pool of workers:
#           python -m apache_beam.runners.worker.worker_pool_main --service_port=50000
#           WORKERS is the parallelism (default 1). Flink's job server is a jar: Java is needed here.
# spark     needs JOBS, Beam's job server for Spark, and the same pools beside the executors:
#           docker run --net=host apache/beam_spark3_job_server:VERSION \
#             --spark-master-url=spark://head:7077
# POOL      where flink and spark find their pools (default localhost:50000).
#
# All workers must reach --data and --out: a bucket (gs://, s3://, hdfs://, with the extras of
# apache-beam) or a shared file system. One thread per process loads one model. A run that was
# stopped goes on with the shards that are not done when the same command is given again.
# Set KALEIDO to use another command than the `kaleido` on the path.
set -euo pipefail

usage() {
  sed -n '2,27s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
need() { # need NAME...: variables that must be set
  for name in "$@"; do
    if [ -z "${!name:-}" ]; then
      echo "annotate.sh: set $name; see launch/annotate.sh without arguments" >&2
      exit 2
    fi
  done
}

[ $# -ge 2 ] || usage
runner=$1
shift
words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  words+=("$1")
  shift
done
[ $# -eq 0 ] || shift # the --

pool=(--environment_type=EXTERNAL --environment_config="${POOL:-localhost:50000}")
case $runner in
  dataflow)
    need PROJECT REGION BUCKET IMAGE
    flags=(
      --runner=DataflowRunner --project="$PROJECT" --region="$REGION"
      --temp_location="$BUCKET/temp" --staging_location="$BUCKET/staging"
      --sdk_container_image="$IMAGE" --sdk_location=container
      --max_num_workers="${WORKERS:-16}" --machine_type="${MACHINE:-g2-standard-8}"
      --disk_size_gb=200 --number_of_worker_harness_threads=1
      --experiments=no_use_multiple_sdk_containers
    )
    accelerator=${ACCELERATOR-type:nvidia-l4;count:1;install-nvidia-driver}
    if [ -n "$accelerator" ]; then
      flags+=("--dataflow_service_options=worker_accelerator=$accelerator")
    fi
    ;;
  flink)
    need FLINK
    flags=(--runner=FlinkRunner --flink_master="$FLINK" --parallelism="${WORKERS:-1}" "${pool[@]}")
    ;;
  spark)
    need JOBS
    flags=(--runner=PortableRunner --job_endpoint="$JOBS" "${pool[@]}")
    ;;
  *) usage ;;
esac
exec "${KALEIDO:-kaleido}" annotate "${words[@]}" -- "${flags[@]}" "$@"
