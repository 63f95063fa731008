"""A load generator: clients that stream completions from a server, and what they saw.

`load` sends many requests, `beside` one long prompt beside running streams; `memory` watches the server's
process.
Prompts are random token ids, so that their length is exact and no prefix is shared but one that is asked for.
Times are the client's: to the first token, between tokens, to the end.
"""
