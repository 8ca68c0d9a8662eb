"""Base models: where they are, what identifies them, and one service that scores, embeds and generates."""
