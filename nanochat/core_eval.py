"""Multiple choice as CORE does it (DCLM, 2406.11794, app. G): the choice the model finds likeliest is its answer.

    accuracy = multiple_choice(model, tokenizer, [{"context": "The capital of France is", "choices": [...], "gold": 2}])

A choice's score is the mean log-probability of its tokens after the context; chance is 1 / number of choices.
"""

import torch
from torch import nn
from tqdm import tqdm

from nanochat.common import is_main, over_ranks
from nanochat.tokenizer import Tokenizer


@torch.no_grad()
def choice_scores(model: nn.Module, tokenizer: Tokenizer, context: str, choices: list[str]) -> list[float]:
    """Mean log-probability per token of each choice after the context; all choices run as one padded batch."""
    device = next(model.parameters()).device
    prefix = [tokenizer.bos, *tokenizer.encode(context)]
    tails = [tokenizer.encode(" " + choice) for choice in choices]
    longest = max(map(len, tails))
    ids = torch.full((len(tails), len(prefix) + longest), tokenizer.bos)
    for row, tail in zip(ids, tails):  # padding stands behind what is scored, so no token sees it
        row[: len(prefix) + len(tail)] = torch.tensor(prefix + tail)
    hidden = model(ids[:, :-1].to(device), return_hidden=True)[:, len(prefix) - 1 :]  # (choices, longest, C)
    logprobs = model.logits(hidden).log_softmax(-1)
    return [logprobs[i, torch.arange(len(t)), torch.tensor(t)].mean().item() for i, t in enumerate(tails)]


def multiple_choice(model: nn.Module, tokenizer: Tokenizer, items: list[dict]) -> float:
    """Accuracy over items {"context", "choices", "gold"}; ranks share them."""

    def judge(part: list[dict]) -> list[bool]:
        right = []
        for item in tqdm(part, desc="multiple choice", unit="item", leave=False, disable=not is_main()):
            scores = choice_scores(model, tokenizer, item["context"], item["choices"])
            right.append(max(range(len(scores)), key=scores.__getitem__) == item["gold"])
        return right

    return sum(over_ranks(judge, items)) / len(items)
