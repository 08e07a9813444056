"""Flags, memory plan and launcher for large models."""
