"""The OpenAI API as data: request bodies in, response bodies and stream events out, without Ray."""
