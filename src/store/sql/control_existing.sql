-- Which of these topics exist. Primary key, a probe for each name.
-- $1 topics
select t.topic from unnest($1::text[]) n (topic) join shardmq_control.topic t on t.topic = n.topic
