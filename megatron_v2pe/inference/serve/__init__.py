"""An OpenAI-compatible server: requests, their queue, the ranks that answer, and the HTTP side."""
