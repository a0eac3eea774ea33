"""The Parquet manifest of a job: opening, validation, fragments, sampling and labels."""
