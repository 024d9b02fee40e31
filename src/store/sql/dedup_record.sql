-- Records that a group has applied a message, unless it has. Waits for a transaction that is about to.
-- Primary key.
-- $1 group  $2 producer  $3 sequence  $4 index
insert into shardmq_dedup.applied (group_name, producer, sequence, index)
values ($1, $2, $3, $4)
on conflict do nothing
