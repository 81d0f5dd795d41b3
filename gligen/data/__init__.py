"""Examples: where pictures, captions and grounding come from. `scenes` is the drawn world that needs no download."""
