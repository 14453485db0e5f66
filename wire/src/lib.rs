//! Every layout that leaves a conet process: packets, records, images and requests.

#![no_std]
#![forbid(unsafe_code)]

pub mod ip;
