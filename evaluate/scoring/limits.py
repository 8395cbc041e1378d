"""Bounds on one forward of the packed engine; `selfcorrect plan` estimates memory from them."""

PACK_TOKENS = 512  # of one pack: a mask costs their square; BBQ blocks share no more than that
# Models below so many parameters, which overhead slows down, get smaller packs in larger forwards.
SMALL_MODEL = 1_000_000
SMALL_PACK_TOKENS, SMALL_SCORING_TOKENS, SMALL_BATCH_TOKENS = 128, 4096, 16384  # on a CPU
# A call measures at most about a minute's operations of a slow machine, and so many items.
CALL_FLOPS = {"cpu": 2e12, "gpu": 2e14}
MOST_ITEMS = 1024
BATCH_TOKENS = {"gpu": 32768, "cpu": 4096}  # rows x padded length of one forward
CPU_SCORING_TOKENS = 1024  # the same when scoring on a CPU: beyond, activations leave the cache
MOST_REORDERED = 2**29  # weights of which a CPU holds a second copy while it samples (reordered.py)
LARGEST_LOGITS = 2**26  # positions x vocabulary of one forward
