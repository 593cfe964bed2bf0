"""What several gateways share through the state store: API keys and the decision log."""
