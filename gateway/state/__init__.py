"""What several gateways share through the state store: budgets and the decision log."""
