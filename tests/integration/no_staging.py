"""A worker that finds its kernels impossible to prepare on the host, as some GPU kernels are."""

from __future__ import annotations

from experts.vllm_worker import WeightPoolExtension


class NoStaging(WeightPoolExtension):
    def _coe_staging_flaw(self, expert: str, path: str, digest: str) -> str:
        return "its kernels can only be prepared on the device"
