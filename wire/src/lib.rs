//! Every layout that leaves a conet process: packets, records, images and requests.
