"""Conversations to token ids: reading data, chat templates, predicted tokens and the bytes each of them covers."""
