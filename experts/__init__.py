"""What an expert is: catalogue, domain types, errors, backends, the vLLM engine, the weight pool."""
