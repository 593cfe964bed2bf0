"""What we may spend and when to try again: policies, plans, cascades, money."""
