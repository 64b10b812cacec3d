"""What completes prompts: vLLM, or an HTTP endpoint."""
