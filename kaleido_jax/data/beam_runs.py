"""Beam pipelines on the runner that the words after `--` name, or on this machine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import (
    ExtendedProvisionInfo,
    FnApiRunner,
)
from apache_beam.runners.portability.portable_runner import JobServiceHandle

from kaleido_jax.errors import UserError

HERE = (None, "DirectRunner")
_WORKERS_LOG = "--default_sdk_harness_log_level=WARNING"  # the last of two flags counts


def read_options(flags: Sequence[str]) -> PipelineOptions:
    """Beam's options.

    Raises:
      UserError: a value that is none, or on this machine an option that Beam does not have; other
        runners may have options of their own.
    """
    options = PipelineOptions([_WORKERS_LOG, *flags])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse prints pages of usage
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"Beam's words after --: {reason}") from error
    unknown = sorted(given.keys() - PipelineOptions([]).get_all_options().keys())
    if unknown and runner_of(options) in HERE:
        raise UserError(f"Beam's words after --: there is no option --{unknown[0]}")
    return options


def runner_of(options: PipelineOptions) -> str | None:
    """The runner's name; None where nobody says."""
    return options.view_as(StandardOptions).runner


def new_pipeline(options: PipelineOptions) -> beam.Pipeline:
    """An empty pipeline. Raises UserError: no such runner, or options that do not suit it."""
    runner = runner_of(options)
    try:
        # DirectRunner would look for another runner on the network before it takes this one.
        return beam.Pipeline(_in_process(options) if runner in HERE else runner, options)
    except ValueError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"Beam's words after --: {reason}") from error


def _in_process(options: PipelineOptions) -> FnApiRunner:
    """Beam's runner on this machine; its workers get the options too."""
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return FnApiRunner(provision_info=ExtendedProvisionInfo(info))
