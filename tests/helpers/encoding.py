"""One conversation as ids, without an encoder to keep."""

from fusechat_fuse.text.chat import ConversationEncoder, Encoded


def encode_conversation(tokenizer, messages, template="native", max_length: int = 2048) -> Encoded:
    return ConversationEncoder(tokenizer, template, max_length).encode(messages)
