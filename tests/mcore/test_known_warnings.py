"""Of Megatron-Core's warnings only those are silenced that no user can act on."""

import warnings

from dspark_megatron.mcore.prepare import silence_megatron

OPTIMIZER = "megatron.core.optimizer.optimizer"


def test_only_known_warnings_are_silenced():
    given = [
        ("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.backends"),
        ("Transformer Engine and Apex are not installed. Falling back to ...", OPTIMIZER),
        ("Apex is not installed", "some.other.package"),
        ("the next bucket has already been dispatched", OPTIMIZER),
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_megatron()
        for message, module in given:
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    assert [str(one.message) for one in seen] == [message for message, _ in given[2:]]
