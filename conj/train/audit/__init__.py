"""What of a finished run holds: hashes, training's traces, a replay, a second opinion."""
