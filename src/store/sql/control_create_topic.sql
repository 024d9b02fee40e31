-- Records a topic whose partitions its nodes have taken, with its map of key slots.
-- $1 topic  $2 partitions  $3 first slots  $4 last slots  $5 its id  $6 its generation
with t as (insert into shardmq_control.topic (topic, topic_id, generation) values ($1, $5, $6)),
p as (insert into shardmq_control.partition (partition, topic, generation)
      select n, $1, $6 from unnest($2::int[]) n)
insert into shardmq_control.slots (topic, generation, first_slot, last_slot, partition)
select $1, $6, s.first, s.last, s.partition
  from unnest($3::int[], $4::int[], $2::int[]) s (first, last, partition)
