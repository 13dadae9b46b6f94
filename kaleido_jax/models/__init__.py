"""Networks: a backbone is one file that exports `Model` and `Config`."""
