"""Scores of tasks; SQL and regexes are checked in a sandboxed child process."""
