"""fastppo inside other people's trainers: one module a library, imported only by those who use that library."""
