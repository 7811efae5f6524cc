"""A draft from Python: answer a prompt, compute the loss, export.

python examples/python_api.py --target TARGET --draft DRAFT_OR_RUN --output FOLDER
"""

import argparse

from dspark_megatron import Draft, Target

parser = argparse.ArgumentParser(description="Load a draft, decode, compute its loss, export it.")
parser.add_argument("--target", required=True, help="folder of the target")
parser.add_argument("--draft", required=True, help="folder of a draft, or a run")
parser.add_argument("--output", required=True, help="folder to export to")
arguments = parser.parse_args()

target = Target.from_pretrained(arguments.target)
draft = Draft.from_pretrained(arguments.draft, target=target)

answer = draft.generate("Name three rivers.", max_new_tokens=64)
print(answer.text)
print(f"tau {answer.figures['tau']}: tokens of a round of speculative decoding")

question = {"role": "user", "content": "Name three rivers."}
written = {"role": "assistant", "content": "The Nile, the Rhine and the Ganges."}
loss = draft.loss(target.encode([{"messages": [question, written]}]))
loss.value.backward()
print(f"loss {loss.value.item():.3f}, tau {loss.figures['tau']:.3f} on a written answer")

print(f"wrote {draft.export(arguments.output)}")
