"""One chat line on its way to tokens and a loss mask, a file for each step.

messages.py       the line as a chat, its messages in one spelling
spellings.py      other spellings of the same chat, which some templates want
template.py       the chat through the tokenizer's template, to tokens and a mask
completeness.py   whether the rendered text has all that the chat says
reasoning.py      the reasoning and the content of an answer
answers.py        what the target saw of a rendered chat, and what it wrote
loss_mask.py      tokens with their character ranges, and which of them are learnt

`conversation.py`, one folder up, applies all of this to a line.
"""
