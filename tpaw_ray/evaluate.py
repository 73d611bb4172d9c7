"""`tpaw evaluate`: the commands, from their arguments to Ray and back."""
