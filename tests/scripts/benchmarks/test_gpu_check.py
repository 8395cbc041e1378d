"""The GPU check on a CPU: the packed engine against the definition, and the plan of its PPO."""

from selfcorrect.scripts.benchmarks.gpu_check import (
    Machine,
    check_packed,
    planned_memory,
    society,
)


def test_parts_on_a_cpu(tmp_path):
    machine = Machine("cpu")
    tokenizer, requests = society(tmp_path, 8)
    assert len(requests) == 8
    rows = check_packed(machine, "tiny", tokenizer, requests)
    assert rows[0][1].startswith("largest distance")
    assert rows[0][2] == "0 of 8 choices differ"
    assert 1e8 < planned_memory(machine, "tiny").total < 2e9
