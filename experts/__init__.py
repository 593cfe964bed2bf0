"""What an expert is: catalogue, types, errors, backends, the vLLM engine, the weight pool."""
