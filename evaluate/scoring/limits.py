"""Bounds on one forward of the packed engine; `selfcorrect plan` estimates memory from them."""

PACK_TOKENS = 512  # of one pack: a mask costs their square; BBQ blocks share no more than that
BATCH_TOKENS = {"gpu": 32768, "cpu": 4096}  # rows x padded length of one forward
CPU_SCORING_TOKENS = 1024  # the same when scoring on a CPU: beyond, activations leave the cache
LARGEST_LOGITS = 2**26  # positions x vocabulary of one forward
