"""Stand-ins for Chatwoot and Dify on sockets, which answer as the real ones document, and fail when told to."""
