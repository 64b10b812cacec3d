"""From preference data to packs of tokens, and what every stage stands on: files, manifests, options."""
