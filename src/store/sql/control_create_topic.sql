-- Records a topic whose partitions its nodes have taken, with its map of key slots.
-- $1 topic  $2 partitions  $3 first slots  $4 last slots
with t as (insert into shardmq_control.topic (topic) values ($1)),
p as (insert into shardmq_control.partition (partition, topic, generation)
      select n, $1, 1 from unnest($2::int[]) n)
insert into shardmq_control.slots (topic, generation, first_slot, last_slot, partition)
select $1, 1, s.first, s.last, s.partition
  from unnest($3::int[], $4::int[], $2::int[]) s (first, last, partition)
