//! Sessions and calls between nodes: a sans-IO core and its carriers.
