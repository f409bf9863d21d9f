"""A few thousand chat prompts, made of phrasings and subjects: what the shipped heads see the base answer."""

from chat.prompts import Conversation, chat_prompts, generic_prompts

__all__ = ["Conversation", "chat_prompts", "generic_prompts"]
