"""Files of chats in several forms."""


def talk(*texts):
    """User and assistant by turns."""
    return turns(*zip(["human", "gpt"] * len(texts), texts, strict=False))


def turns(*pairs):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}
