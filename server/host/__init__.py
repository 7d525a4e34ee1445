"""The server's host: keys, the SuperLink, and which node holds which partition."""
