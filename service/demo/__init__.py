"""An airline's care desk: the whole loop on real text, over HTTP only."""
