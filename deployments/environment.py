"""Names of the environment variables by which the parts of one installation find each other.

Secrets travel this way only: process lists, Serve's status page and logs do not show environments.
"""

from __future__ import annotations

TOKEN_ENV = "COE_HOST_TOKEN"  # shared by gateways and expert hosts
REDIS_ENV = "COE_REDIS_URL"  # the state store, password included
CONFIG_ENV = "COE_CONFIG"  # the coe.yaml in force
