#!/usr/bin/env bash
# All that needs one NVIDIA GPU, in the minutes it has: see gpu_suite.py, or --help, which names the wheels to carry.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_suite.py" "$@"
