"""What an evaluation writes (samples, results, the report), and what reads it back.

`compare` compares two runs; `llava_answer_files` reads predictions that other programs wrote.
"""
