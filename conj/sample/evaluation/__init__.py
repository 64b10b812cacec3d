"""Stage 7: judges on benchmarks, figures and the report; attacks."""
