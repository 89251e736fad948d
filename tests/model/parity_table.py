"""Print the largest differences from transformers over the random architectures of `test_parity.py`.

    python tests/model/parity_table.py

Every number is max|a − b| / max|b| of a tensor, the worst of all.
"""

from __future__ import annotations

from hf_oracle import configs, differences
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.model.settings import ModelConfig

NUM_CONFIGS = 24
worst: dict[str, float] = {}


@settings(max_examples=NUM_CONFIGS, derandomize=True, deadline=None, database=None)
@given(config=configs(), seed=st.integers(0, 2**16))
def compare(config: ModelConfig, seed: int) -> None:
    for what, difference in differences(config, seed).items():
        worst[what] = max(worst.get(what, 0.0), difference)


if __name__ == "__main__":
    compare()
    for what, difference in worst.items():
        print(f"{what:72} {difference:.1e}")
