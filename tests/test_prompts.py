from mar.prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS


def test_training_and_held_out_prompts_are_many_and_disjoint() -> None:
    assert (len(TRAIN_PROMPTS), len(HELD_OUT_PROMPTS)) == (32, 16)
    every = [" ".join(prompt.lower().split()) for prompt in (*TRAIN_PROMPTS, *HELD_OUT_PROMPTS)]
    assert len(set(every)) == 48
