"""Every causal architecture of transformers, tiny and random: scores equal those of plain rows."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.architectures import CAUSAL, NOT_BUILT


def test_matrix_holds_every_causal_architecture():
    built = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in CAUSAL}
    missing = [
        name
        for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture not in built and name not in NOT_BUILT
    ]
    assert not missing and len(CAUSAL) == len(built) > 150
