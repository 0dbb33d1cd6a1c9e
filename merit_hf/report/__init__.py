"""`merit report`: one self-contained page of a run. `page` writes it; the other rooms are its parts."""
