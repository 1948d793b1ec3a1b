"""The page that shows, in development, the dialogues, their messages and how far each has got."""
