-- A generation's map of key slots. Primary key.
-- $1 topic  $2 generation
select first_slot, last_slot, partition from shardmq_control.slots
 where topic = $1 and generation = $2 order by first_slot
