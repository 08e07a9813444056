"""Memory plan, preflight and launcher for large models."""
