"""A tiny model that has learned three answers, so that clients see texts, calls and ends that are known.

What it writes depends on the last words of the prompt alone, which its template chooses: without tools a
sentence, with tools a call, after a tool's result another sentence. Grammars bend it as any other model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from app.core.records.specs import Recipe
from tests.tiny_models import TOKENIZER, EngineRun, random_model, save_model, some_text, tiny_spec

SAID = "Rome is a city in Italy."
CALLED = {"name": "visit", "arguments": {"city": "Rome"}}
AFTER = "It is sunny in Rome."
# What ends the prompt, and the answer to it.
ANSWERS = {
    "Say:": SAID,
    "Use a tool:": '<tool_call>\n{"name": "visit", "arguments": {"city": "Rome"}}\n</tool_call>',
    "Read the result:": AFTER,
}
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content or '' }}
{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>
{% endfor %}{% endfor %}{% if add_generation_prompt %}{% if messages[-1].role == 'tool' %}Read the result:
{%- elif tools %}Use a tool:{% else %}Say:{% endif %}{% endif %}"""
STEPS = 150
ROWS, LEAD = 4, 24  # of each answer in a step; tokens before it


def taught_artifact(folder: Path) -> Path:
    """The folder of such a model, quantized to eight bits."""
    torch.manual_seed(0)
    # Windows keep what stands far before out of sight.
    model = random_model("mistral", sliding_window=16, max_position_embeddings=2048).train()
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    answers = [(tokenizer.encode(end).ids, [*tokenizer.encode(text).ids, 0]) for end, text in ANSWERS.items()]
    words = torch.tensor(tokenizer.encode(some_text("valid")).ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for end, answer in answers:
            starts = torch.randint(0, len(words) - LEAD, (ROWS,))
            leads = torch.stack([words[start : start + LEAD] for start in starts])
            row = torch.tensor(end + answer).expand(ROWS, -1)
            tokens = torch.cat([leads, row], dim=1)
            logits = model(input_ids=tokens).logits[:, -len(answer) - 1 : -1]
            loss = loss + cross_entropy(logits.flatten(0, 1), tokens[:, -len(answer) :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, "it has not learned its answers"
    saved = save_model(model.eval(), folder / "model")
    (saved / "chat_template.jinja").write_text(TEMPLATE)
    recipe = Recipe(method="rtn", bits=8, group_size=32, symmetric=True)
    run = EngineRun(tiny_spec(recipe, formats=("compressed-tensors",)), saved, folder / "work")
    return run.work / run.finished.outputs[0].folder
