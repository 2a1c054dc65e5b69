"""What a checkpoint's heads and meta tokens do, and what training changed: measured, drawn and put into words.

result (what is measured) ← rows, texts ← weights, observing ← attention, fusion, importance, meta_tokens, movement,
alignment, cost ← findings, plots ← page ← inspecting
"""
